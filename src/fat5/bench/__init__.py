"""Tools for development: the static report of kernels, tuning, timing."""
