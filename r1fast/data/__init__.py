"""Sources, templates, packing, and the embedded tasks."""
