"""The provider for CPUs, with kernels that the machine's own compiler builds."""
