"""A run without Slurm: its supervisor as a detached process of this machine."""
