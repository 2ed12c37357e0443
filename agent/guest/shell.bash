# What bash does at the end of a command that a remembering shell runs (shell.go): it reports to $__soulbox_file how the shell is.
# Aliases are expanded when a line is read, and none are while this is read; functions of the user's that are named like a builtin are got
# around by "builtin", and one named "builtin" by POSIX mode, in which special builtins are found before functions.
__soulbox_save() {
	__soulbox_o=$SHELLOPTS __soulbox_b=$BASHOPTS POSIXLY_CORRECT=1
	unset -f builtin
	unset POSIXLY_CORRECT
	builtin set +eux
	builtin trap - DEBUG ERR RETURN
	builtin unset -f __soulbox_save
	__soulbox_saved=1
	{
		builtin printf '%s\0' "$__soulbox_fo" "$__soulbox_o" "$__soulbox_fb" "$__soulbox_b"
		builtin pwd
		builtin printf '\0'
		builtin umask -p
		builtin printf '\0'
		builtin alias -p
		builtin printf '\0'
		builtin declare -F
		builtin printf '\0'
		builtin declare -f
		builtin printf '\0'
		[[ ${#FUNCNAME[@]} -gt 1 ]] || builtin declare -p
		builtin printf '%s\0' '' "$@" end
	} >|"$__soulbox_file"
}
trap '[[ -n ${__soulbox_saved-} ]] || { __soulbox_save "$@"; } 2>/dev/null' EXIT
