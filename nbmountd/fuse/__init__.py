"""The kernel's side. Only this package imports pyfuse3."""
