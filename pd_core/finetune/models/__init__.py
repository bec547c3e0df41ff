"""Networks in training: what is opened, stepped and saved, by kind of generator."""
