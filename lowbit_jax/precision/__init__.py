"""Mixed precision: how much each part of a model minds being quantised, and who gets which bits."""
