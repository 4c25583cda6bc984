# Questions about CUDA before the build enables the language.

# nvcc: the compiler that CMake would use. version: its version, "" if there is no nvcc.
function(find_nvcc nvcc version)
  set(program "${CMAKE_CUDA_COMPILER}")
  if(NOT program AND NOT "$ENV{CUDACXX}" STREQUAL "")
    get_filename_component(program "$ENV{CUDACXX}" PROGRAM)
  endif()
  if(NOT program)
    unset(nvcc_program CACHE)
    find_program(nvcc_program nvcc HINTS "$ENV{CUDA_PATH}/bin")
    set(program "${nvcc_program}")
    unset(nvcc_program CACHE)
  endif()
  set(text "")
  if(program)
    execute_process(COMMAND "${program}" --version OUTPUT_VARIABLE text ERROR_QUIET RESULT_VARIABLE failed)
  endif()
  string(REGEX MATCH "release [0-9.]+, V([0-9.]+)" _ "${text}")
  set(${nvcc} "${program}" PARENT_SCOPE)
  set(${version} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# The architectures for the value `wanted` of MEGALODON_OPS_ARCHITECTURES: 80 is machine code and PTX, 90-real machine
# code alone.
function(choose_architectures architectures wanted nvcc version)
  if(wanted STREQUAL "all")
    # PTX of 100 is for the cards between and after the listed ones, such as 110. Blackwell needs nvcc 12.8.
    set(chosen 80 90-real)
    if(version VERSION_GREATER_EQUAL 12.8)
      list(APPEND chosen 100 120-real)
    endif()
  elseif(wanted STREQUAL "AUTO")
    # Without a GPU, 80 is chosen: cards of compute capability 8.x run its machine code, and later cards compile its PTX
    # at the first launch.
    _architectures_of_gpus(chosen "${nvcc}")
    if(NOT chosen)
      set(chosen 80)
    endif()
  else()
    set(chosen ${wanted})
  endif()
  set(${architectures} "${chosen}" PARENT_SCOPE)
endfunction()

# nvcc's flags for a list of architectures. nvcc 13 generates the same PTX for 80 and 90, and for 100 and 120, except
# the line that names the architecture. So each pair shares its PTX, which takes 60 % of the time of an architecture.
function(flags_of_architectures flags architectures)
  foreach(architecture IN LISTS architectures)
    string(REGEX MATCH "^[0-9]+" number "${architecture}")
    set(base 80)
    if(number GREATER_EQUAL 100)
      set(base 100)
    endif()
    list(APPEND of_${base} sm_${number})
    if(architecture STREQUAL number)
      list(APPEND of_${base} compute_${base})
    endif()
  endforeach()
  set(result)
  foreach(base IN ITEMS 80 100)
    if(of_${base})
      list(REMOVE_DUPLICATES of_${base})
      list(JOIN of_${base} "," code)
      list(APPEND result "--generate-code=arch=compute_${base},code=[${code}]")
    endif()
  endforeach()
  set(${flags} "${result}" PARENT_SCOPE)
endfunction()

# The architectures of this machine's GPUs that the kernels run on. A GPU that is newer than nvcc gets nvcc's newest
# architecture, whose PTX is compiled for that GPU.
function(_architectures_of_gpus architectures nvcc)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities ERROR_QUIET RESULT_VARIABLE failed)
  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET RESULT_VARIABLE failed)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${capabilities}")
  string(REGEX MATCHALL "[0-9]+" known "${known}")
  list(SORT known COMPARE NATURAL)
  set(chosen)
  foreach(capability IN LISTS capabilities)
    string(REPLACE "." "" capability "${capability}")
    set(best)
    foreach(architecture IN LISTS known)
      if(architecture GREATER_EQUAL 80 AND architecture LESS_EQUAL capability)
        set(best ${architecture})
      endif()
    endforeach()
    list(APPEND chosen ${best})
  endforeach()
  list(REMOVE_DUPLICATES chosen)
  set(${architectures} "${chosen}" PARENT_SCOPE)
endfunction()

# The CUDA version of the torch in `folder`, such as 12.8; "" without torch or with a CPU build. torch's version.py is
# read as text, since importing torch takes seconds.
function(find_torch_cuda cuda folder)
  set(lines "")
  if(EXISTS "${folder}/torch/version.py")
    file(STRINGS "${folder}/torch/version.py" lines REGEX "^cuda[ :]")
  endif()
  string(REGEX MATCH "['\"]([0-9]+\\.[0-9]+)['\"]" _ "${lines}")
  set(${cuda} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# Warns if nvcc's major version is later than that of torch's CUDA: the driver that runs torch may then be too old.
function(compare_with_torch version folder)
  find_torch_cuda(torch_cuda "${folder}")
  string(REGEX MATCH "^[0-9]+" major "${version}")
  string(REGEX MATCH "^[0-9]+" torch_major "${torch_cuda}")
  if(torch_cuda AND torch_major LESS major)
    message(WARNING "CUDA kernels built with nvcc ${version} need an NVIDIA driver that supports CUDA ${major}. torch is "
        "built for CUDA ${torch_cuda}, which older drivers run, too. `python -m megalodon_ops info` compares; if the "
        "driver is older, update it or put an nvcc of CUDA ${torch_major} in CUDACXX.")
  endif()
endfunction()
