"""From a trained model to a useful one."""
