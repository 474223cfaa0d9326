"""The work: one file a stage, pure functions of tensors and one config."""
