"""The losses of distillation."""
