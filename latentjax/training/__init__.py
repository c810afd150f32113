"""The trainer: mesh and sharding rules, the step, the loop, and what a run leaves behind."""
