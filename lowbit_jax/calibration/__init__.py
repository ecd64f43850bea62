"""Runs a model through its sampler and collects what every linear is given, per timestep range."""
