# Where CUTLASS's headers come from: SAPWOOD_CUTLASS, a CMake variable or else an environment variable, is
#   AUTO (default)  the wheel of third_party/README.md, fetched by pip once and unpacked into build-cutlass/ of the
#                   checkout. Without pip or network the kernels that need it are left out, with a warning that says so
#   OFF             they are left out
#   a folder        that has cutlass/cutlass.h, at its top or in include/. An error where it has not
# A folder that AUTO has unpacked serves later builds without network, on this machine or copied to another.
set(cutlass_version 4.2.0.0)
set(cutlass_sha256 f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6)
if(DEFINED ENV{SAPWOOD_CUTLASS})
  set(cutlass_default "$ENV{SAPWOOD_CUTLASS}")
else()
  set(cutlass_default AUTO)
endif()
set(SAPWOOD_CUTLASS "${cutlass_default}" CACHE STRING "CUTLASS's headers: AUTO, OFF, or a folder")

# Leaves the folder that has cutlass/cutlass.h in `out`, or "" where the kernels that need it are left out.
function(sapwood_find_cutlass out)
  set(${out} "" PARENT_SCOPE)
  if(SAPWOOD_CUTLASS STREQUAL "OFF")
    message(STATUS "SAPWOOD_CUTLASS=OFF: the kernels by wgmma are left out")
    return()
  endif()
  if(NOT SAPWOOD_CUTLASS STREQUAL "AUTO")
    foreach(folder "${SAPWOOD_CUTLASS}" "${SAPWOOD_CUTLASS}/include")
      if(EXISTS "${folder}/cutlass/cutlass.h")
        get_filename_component(folder "${folder}" ABSOLUTE BASE_DIR "${PROJECT_SOURCE_DIR}")
        message(STATUS "CUTLASS: ${folder}")
        set(${out} "${folder}" PARENT_SCOPE)
        return()
      endif()
    endforeach()
    message(FATAL_ERROR "SAPWOOD_CUTLASS: expected AUTO, OFF, or a folder with cutlass/cutlass.h or "
      "include/cutlass/cutlass.h, got \"${SAPWOOD_CUTLASS}\"")
  endif()

  set(home "${PROJECT_SOURCE_DIR}/build-cutlass/${cutlass_version}")
  if(NOT EXISTS "${home}/cutlass/cutlass.h")
    cutlass_unpack_wheel("${home}" reason)
    if(reason)
      message(WARNING "CUTLASS ${cutlass_version} could not be fetched, so the kernels by wgmma are left out and "
        "compute capability 9.0 runs the portable ones: ${reason}. Name an unpacked copy by "
        "-DSAPWOOD_CUTLASS=<folder>, or silence this by -DSAPWOOD_CUTLASS=OFF")
      return()
    endif()
  endif()
  message(STATUS "CUTLASS ${cutlass_version}: ${home}")
  set(${out} "${home}" PARENT_SCOPE)
endfunction()

# The wheel's headers into `home`; `reason` says why not, or is "".
function(cutlass_unpack_wheel home reason)
  set(work "${CMAKE_CURRENT_BINARY_DIR}/cutlass-wheel")
  file(REMOVE_RECURSE "${work}")
  file(MAKE_DIRECTORY "${work}")
  if(Python_EXECUTABLE)
    set(python "${Python_EXECUTABLE}")
  else()
    find_program(python NAMES python3 python NO_CACHE)
  endif()
  if(NOT python)
    set(${reason} "there is no python3 to run pip" PARENT_SCOPE)
    return()
  endif()
  # A hash makes pip refuse everything but that wheel. -I: what a build by pip puts on Python's path hides pip itself.
  file(WRITE "${work}/requirements.txt" "nvidia-cutlass==${cutlass_version} --hash=sha256:${cutlass_sha256}\n")
  execute_process(
    COMMAND "${python}" -I -m pip download --disable-pip-version-check -q --no-deps --only-binary :all: --require-hashes
      --retries 1 --timeout 15 -r requirements.txt -d .
    WORKING_DIRECTORY "${work}" RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
  file(GLOB wheel "${work}/nvidia_cutlass-*.whl")
  if(failed OR NOT wheel)
    string(STRIP "${said}" said)
    string(REGEX REPLACE ".*\n" "" said "${said}")
    set(${reason} "${python} -m pip download: ${said}" PARENT_SCOPE)
    return()
  endif()
  set(include cutlass_library/source/include)
  file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${work}" PATTERNS "${include}/*")
  # Unpacked beside its place and moved there, so that a copy that is there is whole.
  get_filename_component(parent "${home}" DIRECTORY)
  file(MAKE_DIRECTORY "${parent}")
  file(REMOVE_RECURSE "${home}")
  file(REMOVE_RECURSE "${home}.part")
  file(COPY "${work}/${include}/" DESTINATION "${home}.part")
  file(RENAME "${home}.part" "${home}")
  file(REMOVE_RECURSE "${work}")
  set(${reason} "" PARENT_SCOPE)
endfunction()
