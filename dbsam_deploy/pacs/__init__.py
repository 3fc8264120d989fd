"""A PACS over DICOMweb: studies in, segmentations out."""
