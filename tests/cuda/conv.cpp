#include "emulator.h"
#include "mamba_conv.cu"
static bool added = emulator::add("conv_forward", conv_forward) && emulator::add("conv_backward", conv_backward);
