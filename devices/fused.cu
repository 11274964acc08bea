// fused
