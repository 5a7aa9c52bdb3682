"""Measures machines with the kernels that plans emit, and any one rank of a plan alone on one device."""
