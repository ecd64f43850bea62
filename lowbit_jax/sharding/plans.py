"""The named plans: "tensor" for every network, "fsdp" and "data" for any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowbit_jax.sharding.plan import Plan, PlanError, Rule

PLANS = ("tensor", "fsdp", "data")


def named_plan(name: str, network: str, config: Any) -> Plan:
    """A plan by name.

    * "tensor": every device multiplies with its share (Megatron): heads and hidden features by
      outputs, what joins them again by inputs, over the mesh axis "model"; batches over "data".
    * "fsdp": every matrix is stored in shares over "data" and gathered, as codes, for each product;
      batches over "data".
    * "data": every device has all; batches over "data".

    Raises:
        PlanError: no such plan; "tensor" of a model that has no rules for it.
    """
    if name == "tensor" and network not in _TENSOR:
        raise PlanError(f"'{network}' has no plan 'tensor'; {', '.join(_TENSOR)} have")
    if name == "tensor":
        return Plan(name=name, rules=_TENSOR[network](config))
    if name == "fsdp":
        return Plan(name=name, stored="data")
    if name == "data":
        return Plan(name=name)
    raise PlanError(f"plan '{name}' is none of {', '.join(PLANS)}")


def _flux(config: Any) -> tuple[Rule, ...]:
    width, mlp, head = config.hidden_size, config.mlp_size, config.head_dim
    double = r"double_blocks/\d+/(img|txt)_"
    return (
        Rule(match=double + "attn/qkv", how="outputs", parts=3 * (width,), unit=head),
        Rule(match=double + "attn/proj", how="inputs", unit=head),
        Rule(match=double + "mlp/in_layer", how="outputs"),
        Rule(match=double + "mlp/out_layer", how="inputs"),
        Rule(match=r"single_blocks/\d+/linear1", how="outputs", parts=(*3 * (width,), mlp)),
        Rule(match=r"single_blocks/\d+/linear2", how="inputs", parts=(width, mlp)),
        Rule(match=r".*(_mod|modulation)/lin|.*/adaLN_modulation", how="gathered"),
        Rule(match=r"txt_in|(time|guidance|vector)_in/.*", how="gathered"),
    )


def _attention_and_mlp(config: Any) -> tuple[Rule, ...]:
    """Networks of `models.attention` and `models.layers.MLP`; what does not divide stays whole."""
    width, head = config.hidden_size, config.hidden_size // config.num_heads

    def rule(match: str, how: Any, parts: int = 1, unit: int = 1) -> Rule:
        sizes = parts * (width,) if parts > 1 else ()
        return Rule(match=match, how=how, parts=sizes, unit=unit, otherwise="whole")

    return (
        rule(r"blocks/.*/qkv", "outputs", 3, head),
        rule(r"blocks/.*/q_linear", "outputs", 1, head),
        rule(r"blocks/.*/kv_linear", "outputs", 2, head),
        rule(r"blocks/.*attn(_temp)?/proj", "inputs", 1, head),
        rule(r".*/fc1", "outputs"),
        rule(r".*/fc2", "inputs"),
        rule(r".*/adaLN_modulation|t_block", "gathered"),
    )


def _without(*endings: str) -> Callable[[Any], tuple[Rule, ...]]:
    """The same for a network that has no such linears: a rule that decides nothing is an error."""

    def rules(config: Any) -> tuple[Rule, ...]:
        found = _attention_and_mlp(config)
        return tuple(rule for rule in found if not rule.match.endswith(endings))

    return rules


_TENSOR: dict[str, Callable[[Any], tuple[Rule, ...]]] = {
    "flux": _flux,
    "dit": _without("/q_linear", "/kv_linear"),
    "pixart": _attention_and_mlp,
    "latte": _without("/q_linear", "/kv_linear"),
    "latte-t2v": _attention_and_mlp,
    "stdit": _attention_and_mlp,
    "stdit3": _attention_and_mlp,
}
