#include "emulator.h"
#include "conv.cu"
static bool added = emulator::add("conv_forward", conv_forward) && emulator::add("conv_backward", conv_backward);
