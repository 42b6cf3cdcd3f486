"""Rule rewards and the worker pool that runs them."""
