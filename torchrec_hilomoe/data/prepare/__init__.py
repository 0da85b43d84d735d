"""Raw files to prepared folders: one module a data set."""
