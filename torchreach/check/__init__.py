"""The checker of certificates: `python -m torchreach.check CERTIFICATE A B`.

It imports NumPy and Python's own library, and nothing of the rest of torchreach, so that what it accepts does not
depend on what made the certificate. `check` says what is verified and what is not.
"""
