"""Axis names, meshes and rules: the only room that names a mesh axis."""
