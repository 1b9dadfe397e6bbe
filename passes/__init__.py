"""The passes, one file each. `vlqc.pipeline.registry.REGISTRY` is the table of their names."""

if __name__ != "vlqc.passes":
    raise ImportError("import this folder as vlqc.passes: a second copy under another name would not share its types")
