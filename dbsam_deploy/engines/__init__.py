"""TensorRT engines: what they are built for, built from, built by, and what must hold to run one.

Kinds and their limits (`kinds`, `profiles`, `device`), the builder and the process it runs in
(`network`, `worker`, `process`, `layers`), the manifest beside each plan (`manifest`), and running
a plan (`shapes`, `cuda`, `runner`). No module here imports TensorRT or CUDA before it is asked to.
"""
