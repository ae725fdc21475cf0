"""A checkpoint as files: names, manifest, checksums, and how a folder appears complete."""
