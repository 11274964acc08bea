// gemm_sm90
