"""Starting runs: imports `transmamba.config` and `transmamba.plan` only, so that it works on a login node."""
