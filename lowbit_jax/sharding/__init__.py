"""One model on several devices: `shard(params, mesh, plan)`; see docs/sharding.md."""
