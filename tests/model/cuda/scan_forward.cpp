#include "emulator.h"
#include "scan_forward.cu"
static bool added = emulator::add("scan_forward", scan_forward) && emulator::add("scan_summary", scan_summary);
