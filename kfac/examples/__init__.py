"""Programs with absl flags that run on the embedded data without a download."""
