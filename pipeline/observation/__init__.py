"""What a run tells about itself while it runs: on the screen, in its folder, and to TensorBoard."""
