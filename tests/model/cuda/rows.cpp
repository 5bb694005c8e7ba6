#include "emulator.h"
#include "rows.cu"
#define ADD(NAME) emulator::add(#NAME, NAME)
static bool added = ADD(norm_forward) && ADD(norm_backward) && ADD(norm_weight) && ADD(norm_forward_narrow) &&
                    ADD(norm_backward_narrow) && ADD(norm_weight_narrow) && ADD(loss_statistics) && ADD(loss_gradient);
