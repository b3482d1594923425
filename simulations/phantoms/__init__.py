"""Made-up patients: chest images that look like radiographs, written as DICOM files; nobody stands behind them."""
