"""What every stage and the server share: errors, the contract, image and prompt arithmetic.

NumPy and Pillow only, and Python 3.10: the Triton repository carries a copy of this folder.
"""
