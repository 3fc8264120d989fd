"""A segmentation as files: NIfTI, DICOM-SEG, RTSTRUCT, npz, PNG and tables."""
