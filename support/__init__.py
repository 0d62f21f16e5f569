"""What serves the method and is none of it: processes, files, drawing, the training log."""
