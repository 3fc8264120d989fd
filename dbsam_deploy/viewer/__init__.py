"""The HTTP protocol of nnInteractive 2.6 on volume sessions: 3D Slicer, napari and MITK."""
