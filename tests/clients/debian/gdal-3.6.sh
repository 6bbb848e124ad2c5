# GDAL's own program.
. "$PROGRAMS/debian/own_libraries.sh"
export GDAL_DATA="$root/usr/share/gdal" PROJ_DATA="$root/usr/share/proj"
export AWS_S3_ENDPOINT="${S3_URL#http://}" AWS_HTTPS=NO AWS_VIRTUAL_HOSTING=FALSE CPL_AWS_AUTODETECT_EC2=NO
export GDAL_DISABLE_READDIR_ON_OPEN=EMPTY_DIR
start "$root/usr/bin/gdalinfo" "/vsis3/$BUCKET/$KEY"
