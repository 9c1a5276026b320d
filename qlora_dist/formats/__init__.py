"""Published formats: quantized weights as their makers publish them, such as FP8 and MXFP4, and their arithmetic."""
