"""What an input names: files, folders, globs and URIs, in one order; and a part of their rows."""
