"""The side of the engine that holds tensors: runs a StepPlan and returns a StepResult."""
