// ditmoe eval fid: the figures by which image generators are compared.
#ifndef DITMOE_EVAL_FID_H
#define DITMOE_EVAL_FID_H

int eval_fid(int argc, char **argv); // argv[0] is "fid"

#endif
