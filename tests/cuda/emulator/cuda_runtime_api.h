// In place of CUDA's: see emulator.h.
#pragma once

#include "emulator.h"
