// Unpacks a quantized weight.
