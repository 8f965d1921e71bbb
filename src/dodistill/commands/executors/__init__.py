"""Where the cells of a grid run: on this machine, on a Ray cluster, or as slurm jobs."""
