"""Reference arithmetic of the Ascend operators, in torch and NumPy only."""

if __name__ != "vlqc.kernels_ref":
    raise ImportError(
        "import this folder as vlqc.kernels_ref: a second copy under another name would not share its types"
    )
