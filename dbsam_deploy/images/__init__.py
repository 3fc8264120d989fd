"""Files in and out: PNG, JPEG, MedSAM npz, NIfTI and DICOM as volumes, masks and overlays."""
