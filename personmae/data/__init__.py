"""Person images: sources, indexes, plans, loaders, and the layouts of ReID data sets."""
