"""Published scheduler_config.json files: read as diffusers does, refused where not ported."""

import json

import pytest

from lowbit_jax.samplers import ddim, dpm_solver, flow_euler
from lowbit_jax.samplers.registry import SAMPLERS, read_schedule

# As published beside DiT-XL-2-256, PixArt-XL-2-1024-MS, FLUX.1-dev and FLUX.1-schnell.
DIT = """{"_class_name": "DDIMScheduler", "_diffusers_version": "0.12.0.dev0", "beta_end": 0.02,
"beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": false, "num_train_timesteps": 1000,
"prediction_type": "epsilon", "set_alpha_to_one": true, "steps_offset": 0, "trained_betas": null}"""
PIXART = """{"_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.22.0.dev0",
"algorithm_type": "dpmsolver++", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001,
"dynamic_thresholding_ratio": 0.995, "euler_at_final": false, "lambda_min_clipped": -Infinity,
"lower_order_final": true, "num_train_timesteps": 1000, "prediction_type": "epsilon",
"sample_max_value": 1.0, "solver_order": 2, "solver_type": "midpoint", "steps_offset": 0,
"thresholding": false, "timestep_spacing": "linspace", "trained_betas": null,
"use_karras_sigmas": false, "use_lu_lambdas": false, "variance_type": null}"""
FLUX_DEV = """{"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version":
"0.30.0.dev0", "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096,
"max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": true}"""
FLUX_SCHNELL = """{"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version":
"0.30.0.dev0", "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096,
"max_shift": 1.15, "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": false}"""


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        (DIT, ddim.DIT_SCHEDULE),
        (PIXART, dpm_solver.PIXART_SCHEDULE),
        (FLUX_DEV, flow_euler.FLUX_DEV_SCHEDULE),
        (FLUX_SCHNELL, flow_euler.FLUX_SCHNELL_SCHEDULE),
    ],
    ids=["dit", "pixart", "flux-dev", "flux-schnell"],
)
def test_published_files_give_the_schedules_of_their_models(text, schedule):
    assert read_schedule(json.loads(text)) == schedule


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "rectified-flow"])
def test_what_diffusers_saves_reads_back_with_its_own_defaults(name, tmp_path):
    """Every setting that diffusers has today is known, and our defaults are its."""
    diffusers = pytest.importorskip("diffusers", reason="the reference is diffusers")
    sampler = SAMPLERS[name]
    getattr(diffusers, sampler.published_as)().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert len(config) > 5
    assert read_schedule(config) == sampler.schedule()


def test_every_published_class_reads_its_own_file_only():
    for name, sampler in SAMPLERS.items():
        for other, theirs in SAMPLERS.items():
            if name != other:
                with pytest.raises(ValueError, match=f"is not {sampler.published_as}"):
                    sampler.schedule.from_json({"_class_name": theirs.published_as})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("DDPM", {"trained_betas": [0.1]}, r"trained_betas is \[0.1\], only None is ported"),
        ("DDPM", {"thresholding": True}, "thresholding is True, only False is ported"),
        ("DDPM", {"variance_type": "fixed_large_log"}, "variance_type is 'fixed_large_log'"),
        ("DDIM", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ("DDIM", {"variance_type": "learned"}, "unknown setting 'variance_type'"),
        ("DDIM", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type is 'sde"),
        ("DPMSolverMultistep", {"solver_type": "heun"}, "only 'midpoint' is ported"),
        ("DPMSolverMultistep", {"use_lu_lambdas": True}, "use_lu_lambdas is True"),
        ("DPMSolverMultistep", {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ("DPMSolverMultistep", {"lambda_min_clipped": -5.1}, "lambda_min_clipped is -5.1"),
        ("DPMSolverMultistep", {"prediction_type": "flow_prediction"}, "prediction_type is"),
        ("FlowMatchEulerDiscrete", {"use_karras_sigmas": True}, "use_karras_sigmas is True"),
        ("FlowMatchEulerDiscrete", {"shift_terminal": 0.02}, "shift_terminal is 0.02"),
        ("FlowMatchEulerDiscrete", {"sift": 3.0}, "unknown setting 'sift'"),
        ("DDIM", {"clip_sample": "false"}, "clip_sample is 'false', not bool"),
        ("DDIM", {"num_train_timesteps": 1e3}, "num_train_timesteps is 1000.0, not int"),
        ("DDPM", {"beta_end": "0.02"}, "beta_end is '0.02', not float"),
        ("DDPM", {"clip_sample_range": 0}, "clip_sample_range is 0, not above 0"),
        ("FlowMatchEulerDiscrete", {"shift": True}, "shift is True, not float"),
        ("EulerDiscrete", {}, "'EulerDiscreteScheduler' is none of: FlowMatch"),
    ],
)
def test_settings_that_are_not_ported_are_named(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        read_schedule({"_class_name": f"{kind}Scheduler"} | settings)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError) as caught:
        read_schedule({"_class_name": "DDIMScheduler", "thresholding": True, "a": 1, "b": 2})
    for part in ("thresholding is True", "unknown setting 'a'", "unknown setting 'b'"):
        assert part in str(caught.value)


def test_a_file_without_a_class_is_refused():
    with pytest.raises(ValueError, match="scheduler None is none of"):
        read_schedule({"shift": 3.0})
