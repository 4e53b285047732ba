"""Update rules as pure functions of tensors: no variables, no collections."""
