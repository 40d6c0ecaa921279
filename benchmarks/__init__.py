"""Scripts, and what they share. A package, so that none of the same name in site-packages is taken for it."""
