"""Settings, command line and errors; imports neither Ray nor TensorFlow."""
