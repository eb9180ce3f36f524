"""Many independent jobs in a folder: here side by side, as an array of Slurm, or a share each on Kubernetes."""
